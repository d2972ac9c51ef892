#!lua flags=no-writes
-- Tells how far a handler is behind in some aggregates.
-- KEYS: for each aggregate position, lease, events; on another edition than main also divergence and
--       the events of main (see keys.py)
-- ARGV: how many keys each has
-- Reply: for each aggregate how many events it is behind, the last sequence, the time of the first
--        event that is not handled in microseconds or '', and how often that was handed out, all as
--        text
-- include: timeline.lua
-- include: positions.lua
-- include: leases.lua
local width = tonumber(ARGV[1])

local replies = {}
for place = 1, #KEYS, width do
  local position, lease, events = KEYS[place], KEYS[place + 1], KEYS[place + 2]
  local divergence, main = nil, nil
  if width > 3 then
    divergence, main = KEYS[place + 3], KEYS[place + 4]
  end
  local next_sequence, diverged_at = end_of(events, divergence, main)
  local at = tonumber(position_of(redis.call('GET', position), diverged_at) or -1) or -1
  local about = about_lease(lease)
  local first = at + 1 < next_sequence and member_at(events, main, diverged_at, at + 1)
  replies[#replies + 1] = string.format('%.0f', math.max(next_sequence - at - 1, 0))
  replies[#replies + 1] = string.format('%.0f', next_sequence - 1)
  replies[#replies + 1] = string.match(first or '', '^%[%d+,(%-?%d+),') or ''
  replies[#replies + 1] = string.format('%.0f', first and about.of == at + 1 and about.tries or 0)
end
return replies
