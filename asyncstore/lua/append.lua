#!lua
-- Appends events to aggregates of one domain and edition. Each aggregate by itself: all of its
-- events or none, and what is wrong with one does not touch the others.
-- KEYS: commits, roots, editions, domains (see keys.py), then the events of each aggregate
-- ARGV: mark: 'again' when this may be the second arrival of the same call, else '',
--       domain, edition,
--       then for each aggregate: root,
--         expected: the sequence that the first event must get, or '' for any,
--         how many events, and two for each of them: its time in microseconds ('' for the
--         server's time), and what follows the time in its member (see codec.py)
-- Reply: for each aggregate {'ok', first sequence}, {'conflict', next sequence},
--        {'error', first word of the server's error}, or {'error', 'TOOLONG'} when a second
--        arrival had too much to look through
local commits, roots, editions, domains = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local mark, domain, edition = ARGV[1], ARGV[2], ARGV[3]
local FIRST_EVENTS, FIRST_ROOT = 5, 4
local LOOK_AT_ONCE, MOST_LOOKED_AT = 100, 100000 -- of the order of 100 ms
local EVENTS_A_CALL = 1000 -- unpack fails somewhere below 8,000 values

local clock = redis.call('TIME')
local now = clock[1] .. string.format('%06d', clock[2])

-- Numbers for all aggregates are taken with the first that gets one; some may stay unused.
local commit
local function next_commit()
  local most = #KEYS - FIRST_EVENTS + 1
  commit = commit and commit + 1 or redis.call('INCRBY', commits, most) - most + 1
  return commit
end

-- Domain and edition are the same for all aggregates: the first new one puts them into the indexes.
local is_listed = false

-- Returns the sequence in from..to of the event with this id, looked for from the end.
local function find_event(events, id, from, to)
  local least = math.max(from, to - MOST_LOOKED_AT + 1)
  for last = to, least, -LOOK_AT_ONCE do
    local first = math.max(least, last - LOOK_AT_ONCE + 1)
    local members = redis.call('ZRANGE', events, last, first, 'BYSCORE', 'REV')
    for _, member in ipairs(members) do
      local sequence, found = string.match(member, '^%[(%d+),%-?%d+,("%x+")')
      if found == id then
        return tonumber(sequence)
      end
    end
  end
  return nil, least > from
end

local function add(events, sequence, first, last)
  local members = {}
  for place = first, last, 2 do
    local score = string.format('%.0f', sequence)
    local time = ARGV[place]
    if time == '' then
      time = now
    end
    members[#members + 1] = score
    members[#members + 1] = '[' .. score .. ',' .. time .. ',' .. ARGV[place + 1]
    sequence = sequence + 1
    if #members == 2 * EVENTS_A_CALL or place + 1 == last then
      redis.call('ZADD', events, unpack(members))
      members = {}
    end
  end
end

local function append(events, root, expected, first, last)
  local next_sequence = redis.call('ZCARD', events)
  if mark == 'again' then
    local id = string.match(ARGV[first + 1], '^"%x+"')
    local stored, gave_up = find_event(events, id, expected or 0, expected or next_sequence - 1)
    if stored then
      return { 'ok', stored }
    end
    if gave_up then
      return { 'error', 'TOOLONG' }
    end
  end
  if expected and expected ~= next_sequence then
    return { 'conflict', next_sequence }
  end

  -- The indexes first and the events last: an index may name too much, never too little. If one of
  -- these calls fails, the aggregate still has no events, and its next append does them all again.
  -- The events can't fail any more, ZCARD has seen that their key is a sorted set.
  local number = next_commit()
  if next_sequence == 0 and not is_listed then
    redis.call('ZADD', domains, 0, domain)
    redis.call('ZADD', editions, 0, edition)
    is_listed = true
  end
  redis.call('ZADD', roots, number, root)
  add(events, next_sequence, first, last)
  return { 'ok', next_sequence }
end

local replies = {}
local place = FIRST_ROOT
for index = FIRST_EVENTS, #KEYS do
  local root, expected, count = ARGV[place], tonumber(ARGV[place + 1]), tonumber(ARGV[place + 2])
  local first, last = place + 3, place + 2 + 2 * count
  local done, reply = pcall(append, KEYS[index], root, expected, first, last)
  if not done then
    local text = type(reply) == 'table' and reply.err or tostring(reply)
    reply = { 'error', string.match(text, '^%-?(%u+)') or 'ERR' }
  end
  replies[#replies + 1] = reply
  place = last + 1
end
return replies
