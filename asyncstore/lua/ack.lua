#!lua
-- Records that events were handled: moves the position, if the lease still is the worker's own.
-- KEYS: due, position, lease, events; on another edition than main also divergence, the events of
--       main (see keys.py)
-- ARGV: root, holder, the last sequence that was handled or passed over, the id there,
--       the sequence that is handed out next, '' to give the lease back, or 'keep' to keep it if there
--       is nothing more to do, for what comes next,
--       'again' for a dead letter that was handled again, or ''
-- Reply: {'ok'}, {'kept'}, {'more'} or {'idle'} when the lease was given back and there is more to do
--        or not, or {'lost'}
-- include: timeline.lua
-- include: positions.lua
-- include: leases.lua
local due, position, lease = KEYS[1], KEYS[2], KEYS[3]
local events, divergence, main = KEYS[4], KEYS[5], KEYS[6]
local root, holder, through, id = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local following, is_again = ARGV[5], ARGV[6] == 'again'
local moment = now_of_server()
-- include: at_once.lua
-- include: settling.lua
-- include: going_on.lua
redis.call('ZCARD', due) -- fails here, before the first write, if it is something else
-- include: acking.lua

if not is_still_held then
  return { was_acked() and 'more' or 'lost' }
end
return { settle(next_sequence) }
