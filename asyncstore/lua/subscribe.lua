#!lua
-- Notes that a handler works on a domain and edition, and where it begins; the first time counts.
-- KEYS: subscription, subscribed (see keys.py)
-- ARGV: what names it among all, where to begin: 'first', 'now' or microseconds since 1970,
--       what there is now: names with a new line between them, of tags or of domains; '?' if that is
--       not known. All else comes later, and is handled from its first event on.
-- Reply: {'live'} when all is as it should be,
--        {'marking', where it began, what there was then} as long as positions have to be put there,
--        {'new'} when it is, and what there is has to be known
local subscription, subscribed = KEYS[1], KEYS[2]
local name, start, there = ARGV[1], ARGV[2], ARGV[3]

redis.call('ZCARD', subscribed) -- fails here, before the first write, if it is something else
local known = redis.call('HMGET', subscription, 'state', 'start', 'there')
if not known[1] then
  if start ~= 'first' and there == '?' then
    return { 'new' }
  end
  known = { start == 'first' and 'live' or 'marking', start, there }
  redis.call('HSET', subscription, 'state', known[1], 'start', start, 'there', known[1] == 'live' and '' or there)
end
redis.call('ZADD', subscribed, 0, name)
if known[1] == 'live' then
  return { 'live' }
end
return { 'marking', known[2] or 'first', known[3] or '' }
