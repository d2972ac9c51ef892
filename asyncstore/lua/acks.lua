#!lua
-- Does what ack.lua does for many aggregates, each by itself: what is wrong with one does not touch
-- the others.
-- KEYS: due, then for each aggregate what ack.lua has behind it
-- ARGV: how many keys each aggregate has, then for each what ack.lua has
-- Reply: for each aggregate what ack.lua replies, or {'error', first word of the server's error}
-- include: timeline.lua
-- include: positions.lua
-- include: leases.lua
-- include: later.lua
-- include: failing.lua
local due, width = KEYS[1], tonumber(ARGV[1])
local FIRST_KEY, FIRST_ARGUMENT, ARGUMENTS = 2, 2, 6

local moment = now_of_server()
redis.call('ZCARD', due) -- fails here, before the first write, if it is something else

local function ack_one(key, place)
  local position, lease, events = KEYS[key], KEYS[key + 1], KEYS[key + 2]
  local divergence, main
  if width > 3 then
    divergence, main = KEYS[key + 3], KEYS[key + 4]
  end
  local root, holder = ARGV[place], ARGV[place + 1]
  local through, id = tonumber(ARGV[place + 2]), ARGV[place + 3]
  local following, is_again = ARGV[place + 4], ARGV[place + 5] == 'again'
-- include: settling.lua
-- include: going_on.lua
-- include: acking.lua
  if not is_still_held then
    return { was_acked() and 'more' or 'lost' }
  end
  return { settle(next_sequence) }
end

local positions, replies, place = {}, {}, FIRST_ARGUMENT
for key = FIRST_KEY, #KEYS, width do
  positions[#positions + 1] = KEYS[key]
end
read_positions(positions)
for key = FIRST_KEY, #KEYS, width do
  local done, reply = pcall(ack_one, key, place)
  replies[#replies + 1] = done and reply or failure_of(reply)
  place = place + ARGUMENTS
end
write_all(due)
return replies
