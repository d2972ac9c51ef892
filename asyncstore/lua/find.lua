#!lua flags=no-writes
-- Reads the events of an aggregate that were appended with a key, a source or a correlation id.
-- KEYS: claims, events
-- ARGV: what is claimed, the sequence to start at, limit
-- Reply: {sequence to go on after, or '' at the end, member, member, ...}
-- include: claims.lua
-- include: page.lua
local claims, events = KEYS[1], KEYS[2]
local what, start, limit = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local CLAIMS_A_PAGE = 1000

local found = find_claims(claims, what, start, CLAIMS_A_PAGE)
local parts, reply = {}, { '' }
for _, claim in ipairs(found) do
  local first, count = range_of(claim)
  if first + count > start then
    parts[#parts + 1] = { events, math.max(first, start), first + count }
  end
end
page(reply, parts, limit, false, nil)
if reply[1] == '' and #found == CLAIMS_A_PAGE then
  reply[1] = string.format('%.0f', parts[#parts][3] - 1)
end
return reply
