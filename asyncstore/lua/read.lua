#!lua flags=no-writes
-- Reads a page of one aggregate's timeline.
-- KEYS: events; on another edition than main also divergence and the events of main
-- ARGV: start, stop ('' for none), limit, 'backwards' or '', latest time in microseconds or '',
--       where to diverge ('' for where it has)
-- Reply: {sequence to go on after, or '' at the end of the range, where it has diverged or '',
--         member, member, ...}
-- include: timeline.lua
-- include: page.lua
local events, divergence, main = KEYS[1], KEYS[2], KEYS[3]
local start, stop, limit = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local backwards, latest, diverge_at = ARGV[4] == 'backwards', tonumber(ARGV[5]), tonumber(ARGV[6])

local function happened_by_then(member)
  local time = tonumber(string.match(member, '^%[%d+,(-?%d+),'))
  return not time or time <= latest -- what can't be read is for the client to complain about
end

local diverged_at = divergence and divergence_of(divergence)
local parts = parts_of(events, main, diverge_at or diverged_at or FAR, start, stop or math.huge)
local reply = { '', diverged_at and string.format('%.0f', diverged_at) or '' }
page(reply, parts, limit, backwards, latest and happened_by_then)
return reply
