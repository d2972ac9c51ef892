#!lua
-- Appends events to one aggregate: all of them, or none.
-- KEYS: events, roots, editions, domains, commits (see keys.py)
-- ARGV: domain, edition, root,
--       expected: the sequence that the first event must get, or '' for any,
--       mark: 'again' when this may be the second arrival of the same append, else '',
--       then two for each event: its time in microseconds ('' for the server's time),
--       and what follows the time in its member (see codec.py)
-- Reply: {'ok', first sequence} or {'conflict', next sequence}
local events, roots, editions, domains, commits = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local domain, edition, root, expected, mark = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local FIRST_EVENT = 6
local LOOK_AT_ONCE = 100
local EVENTS_A_CALL = 1000 -- unpack fails somewhere below 8,000 values

local next_sequence = redis.call('ZCARD', events)

-- Returns the sequence of this append's first event in from..to, looked for from the end.
local function find_first_event(from, to)
  local id = string.match(ARGV[FIRST_EVENT + 1], '^"%x+"')
  for last = to, from, -LOOK_AT_ONCE do
    local first = math.max(from, last - LOOK_AT_ONCE + 1)
    local members = redis.call('ZRANGE', events, last, first, 'BYSCORE', 'REV')
    for _, member in ipairs(members) do
      local sequence, found = string.match(member, '^%[(%d+),%-?%d+,("%x+")')
      if found == id then
        return tonumber(sequence)
      end
    end
  end
end

if mark == 'again' then
  local place = tonumber(expected)
  local stored = find_first_event(place or 0, place or next_sequence - 1)
  if stored then
    return { 'ok', stored }
  end
end

if expected ~= '' and tonumber(expected) ~= next_sequence then
  return { 'conflict', next_sequence }
end

local clock = redis.call('TIME')
local now = clock[1] .. string.format('%06d', clock[2])

-- The indexes first and the events last: an index may name too much, never too little. If one of
-- these calls fails, the aggregate still has no events, and its next append does them all again.
-- The events can't fail any more, ZCARD has seen that their key is a sorted set.
local commit = redis.call('INCR', commits)
if next_sequence == 0 then
  redis.call('ZADD', domains, 0, domain)
  redis.call('ZADD', editions, 0, edition)
end
redis.call('ZADD', roots, commit, root)

local sequence = next_sequence
for first = FIRST_EVENT, #ARGV, 2 * EVENTS_A_CALL do
  local members = {}
  for place = first, math.min(first + 2 * EVENTS_A_CALL, #ARGV) - 1, 2 do
    local score = string.format('%.0f', sequence)
    local time = ARGV[place]
    if time == '' then
      time = now
    end
    members[#members + 1] = score
    members[#members + 1] = '[' .. score .. ',' .. time .. ',' .. ARGV[place + 1]
    sequence = sequence + 1
  end
  redis.call('ZADD', events, unpack(members))
end
return { 'ok', next_sequence }
