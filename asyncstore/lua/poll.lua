#!lua
-- Tells which aggregates have changed since the last sweep, and which are due: those are kept from
-- other workers for a moment, in which they can be leased.
-- KEYS: subscription, roots, due (see keys.py)
-- ARGV: limit of changed ones, limit of due ones, the moment in microseconds
-- Reply: {number of the commit up to which they were looked at,
--         {root, number of its last commit, ...}, {root, ...},
--         microseconds until the next is due, or '' for none}
-- include: leases.lua
-- include: later.lua
local subscription, roots, due = KEYS[1], KEYS[2], KEYS[3]
local most_changed, most_due, moment = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])

local now = now_of_server()
local swept = redis.call('HGET', subscription, 'swept') or '0'
local changed = {}
if most_changed > 0 then
  local from = '(' .. swept
  changed = redis.call('ZRANGE', roots, from, '+inf', 'BYSCORE', 'LIMIT', 0, most_changed, 'WITHSCORES')
end
local ready = {}
if most_due > 0 then
  local latest = string.format('%.0f', now)
  ready = redis.call('ZRANGE', due, '-inf', latest, 'BYSCORE', 'LIMIT', 0, most_due)
  for _, root in ipairs(ready) do
    make_due(now + moment, root)
  end
  write_all(due)
end
local following = redis.call('ZRANGE', due, 0, 0, 'WITHSCORES')[2]
local wait = following and string.format('%.0f', math.max(following - now, 0)) or ''
return { swept, changed, ready, wait }
