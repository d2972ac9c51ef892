#!lua flags=no-writes
-- Reads a page of one aggregate's events.
-- KEYS: events
-- ARGV: start (a ZRANGE bound), stop (a ZRANGE bound), limit,
--       'backwards' or '', latest time in microseconds or ''
-- Reply: {sequence to go on after, or '' at the end of the range, member, member, ...}
-- include: page.lua
local events = KEYS[1]
local start, stop, limit, direction, latest = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]

local reply = { '' }
page(reply, events, start, stop, tonumber(limit), direction == 'backwards', tonumber(latest))
return reply
