#!lua
-- Notes that a handler works on a domain and edition, and where it begins; the first time counts.
-- KEYS: subscription, subscribed (see keys.py)
-- ARGV: what names it among all, where to begin: 'first', 'now' or microseconds since 1970
-- Reply: {state, where it began, the number of the commit up to which the roots were looked at}
--        with the state 'marking' as long as positions are put where it begins, then 'live'
local subscription, subscribed = KEYS[1], KEYS[2]
local name, start = ARGV[1], ARGV[2]

redis.call('ZCARD', subscribed) -- fails here, before the first write, if it is something else
if redis.call('EXISTS', subscription) == 0 then
  local state = start == 'first' and 'live' or 'marking'
  redis.call('HSET', subscription, 'state', state, 'start', start, 'swept', '0')
  redis.call('ZADD', subscribed, 0, name)
end
local known = redis.call('HMGET', subscription, 'state', 'start', 'swept')
return { known[1] or 'live', known[2] or 'first', known[3] or '0' }
