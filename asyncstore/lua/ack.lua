#!lua
-- Records that events were handled: moves the position, if the lease still is the worker's own.
-- KEYS: due, position, lease, events; on another edition than main also divergence, the events of
--       main (see keys.py)
-- ARGV: root, holder, the last sequence that was handled or passed over, the id there,
--       the sequence that is handed out next, or '' to give the lease back,
--       'again' for a dead letter that was handled again, or ''
-- Reply: {'ok'}, {'more'} or {'idle'} when the lease was given back and there is more to do or not,
--        or {'lost'}
-- include: timeline.lua
-- include: positions.lua
-- include: leases.lua
-- include: handling.lua
local due, position, lease = KEYS[1], KEYS[2], KEYS[3]
local events, divergence, main = KEYS[4], KEYS[5], KEYS[6]
local root, holder, through, id = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local following, is_again = ARGV[5], ARGV[6] == 'again'

local about = about_lease(lease)
local next_sequence, diverged_at = end_of(events, divergence, main)
local at = tonumber(position_of(position, diverged_at) or -1)
if not is_held(about, holder, now_of_server()) then
  return { about.by == holder and (is_again or at >= through) and 'more' or 'lost' }
end
redis.call('ZCARD', due) -- fails here, before the first write, if it is something else

if is_again then
  local left = string.gsub(about.again, '^%d+ ?', '')
  redis.call('HSET', lease, 'holder', '', 'until', '0', 'by', holder, 'again', left)
  redis.call('ZADD', due, 0, root)
  return { 'more' }
end
if at < through then
  advance(position, lease, through, id)
end
if following ~= '' then
  redis.call('HSET', lease, 'by', holder, 'of', following, 'tries', 1)
  return { 'ok' }
end
redis.call('HSET', lease, 'by', holder, 'holder', '', 'until', '0')
if math.max(at, through) + 1 < next_sequence or about.again ~= '' then
  redis.call('ZADD', due, 0, root)
  return { 'more' }
end
redis.call('ZREM', due, root)
return { 'idle' }
