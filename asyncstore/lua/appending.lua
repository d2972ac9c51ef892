-- How events are appended to one aggregate. It goes by what the script before it has named: the keys
-- `commits`, `roots`, `editions` and `domains`; `mark`, `domain`, `edition` and `aggregates`, as
-- append.lua has them; and in `key` and `place` where the first aggregate's own KEYS and ARGV are.
local MOST_LOOKED_AT = 100000 -- of the order of 100 ms
local FIRST_LOOK, LARGEST_LOOK, BYTES_A_LOOK = 4, 100, 262144
local EVENTS_A_CALL = 1000 -- unpack fails somewhere below 8,000 values
local MISSED_A_CONFLICT, MISSED_BYTES_A_CALL = 100, 262144

-- Numbers for all aggregates are taken with the first that gets one; some may stay unused.
local commit, now
local function next_commit()
  if commit then
    commit = commit + 1
  else
    commit, now = take_commits(commits, aggregates)
  end
  return commit
end

-- Domain and edition are the same for all aggregates: the first new one puts them into the indexes.
local is_listed = false

-- Returns the id of the first event to append, as it stands in a member.
local function id_of_first(first)
  return string.match(ARGV[first + 1], '^"%x+"')
end

-- Returns the sequence in from..to of the event with this id, looked for from the end.
local function find_event(events, id, from, to)
  local least = math.max(from, to - MOST_LOOKED_AT + 1)
  local last, size = to, FIRST_LOOK
  while last >= least do
    local first, bytes = math.max(least, last - size + 1), 0
    local members = redis.call('ZRANGE', events, last, first, 'BYSCORE', 'REV')
    for _, member in ipairs(members) do
      bytes = bytes + #member
      local sequence, found = string.match(member, '^%[(%d+),%-?%d+,("%x+")')
      if found == id then
        return tonumber(sequence)
      end
    end
    last = first - 1
    size = bytes > BYTES_A_LOOK and 1 or math.min(LARGEST_LOOK, 4 * size)
  end
  return nil, least > from
end

-- Returns the answer to an append whose key was used: the same as before if this is its second
-- arrival.
local function answer_to_claimed(events, expected, how_many, id, claimed)
  local first, count = range_of(claimed)
  local may_be_its_own = mark ~= '' and count == how_many and (not expected or expected == first)
  if may_be_its_own and find_event(events, id, first, first) then
    return { 'ok', first }
  end
  return { 'duplicate', first, count }
end

-- Returns the answer that an append got before, if its key was used, or if this is its second
-- arrival and its first event is there. Claims are made in one step with events: without a claim, an
-- append with a key was not stored.
local function earlier_answer(events, expected, from, to, first, last, trace)
  local id = id_of_first(first)
  if trace and trace.key then
    local claimed = find_claims(trace.claims, trace.key, 0, 1)[1]
    return claimed and answer_to_claimed(events, expected, (last - first + 1) / 2, id, claimed)
  end
  local stored, gave_up = find_event(events, id, from, to)
  if stored then
    return { 'ok', stored }
  end
  return gave_up and { 'error', 'TOOLONG' }
end

-- Returns whether the index of a correlation id, in another slot, may not name the aggregate any more.
local function may_be_erased(trace)
  local from, to = '[' .. trace.correlation .. '\n', '(' .. trace.correlation .. '\v'
  return (redis.call('GET', trace.erasures) or '0') ~= trace.known_erasures
    or #redis.call('ZRANGE', trace.erasing, from, to, 'BYLEX', 'LIMIT', 0, 1) > 0
end

-- Has the aggregate erased from the index of a correlation id with all else, although the append was
-- refused before which that index had to name it: with a claim of no events.
local function claim_nothing(trace)
  if #find_claims(trace.claims, trace.correlation, 0, 1) == 0 then
    redis.call('ZADD', trace.claims, 0, claim_of(trace.correlation, 0) .. ' 0')
  end
end

local missed_bytes = 0

-- Conflicts of one call share what they may bring; when it is used up, the caller has to read.
local function conflict(events, branch, diverges_at, expected, next_sequence, options)
  local reply = { 'conflict', next_sequence }
  if string.find(options, 'm', 1, true) and missed_bytes < MISSED_BYTES_A_CALL then
    local missed = { '', diverges_at and string.format('%.0f', diverges_at) or '' }
    if expected < next_sequence then
      local main, from = branch and branch.main, math.max(expected - 1, 0)
      local parts = parts_of(events, main, diverges_at or FAR, from, next_sequence)
      page(missed, parts, MISSED_A_CONFLICT, false, nil)
    end
    for _, part in ipairs(missed) do
      reply[#reply + 1] = part
      missed_bytes = missed_bytes + #part
    end
  end
  return reply
end

-- Returns scores and members by turns, nil when they were too many for one call.
local function add(events, sequence, first, last)
  local members, is_one_call = {}, true
  for place = first, last, 2 do
    local score = string.format('%.0f', sequence)
    local time = ARGV[place]
    if time == '' then
      time = now
    end
    members[#members + 1] = score
    members[#members + 1] = '[' .. score .. ',' .. time .. ',' .. ARGV[place + 1]
    sequence = sequence + 1
    if #members == 2 * EVENTS_A_CALL and place + 1 < last then
      redis.call('ZADD', events, unpack(members))
      members, is_one_call = {}, false
    end
  end
  redis.call('ZADD', events, unpack(members))
  return is_one_call and members or nil
end

-- `branch` is nil on main, `trace` where there is nothing to claim.
local function append(events, root, expected, first, last, options, branch, trace)
  local count = redis.call('ZCARD', events)
  local next_sequence, diverges_at = count, nil
  if branch then
    diverges_at = divergence_of(branch.divergence)
    next_sequence = diverges_at and diverges_at + count or redis.call('ZCARD', branch.main)
  end
  if first > last then
    next_commit()
    return { 'ok', next_sequence }
  end
  if mark ~= '' or (trace and trace.key) then
    local from, to = expected or diverges_at or 0, expected or next_sequence - 1
    if count == 0 then
      to = from - 1 -- there is nothing to look through
    end
    local answer = earlier_answer(events, expected, from, to, first, last, trace)
    if answer then
      if answer[1] ~= 'error' and string.find(options, 'd', 1, true) then
        next_commit()
      end
      return answer
    end
  end
  local sequence = expected or next_sequence
  local is_a_new_branch = branch and not diverges_at
  if sequence ~= next_sequence and not (is_a_new_branch and sequence < next_sequence) then
    if mark == 'elsewhere' and sequence > next_sequence then
      return { 'regressed', next_sequence }
    end
    return conflict(events, branch, diverges_at, sequence, next_sequence, options)
  end
  if trace and trace.erasures and may_be_erased(trace) then
    return { 'erased', tonumber(redis.call('GET', trace.erasures) or '0') }
  end
  -- These fail here, before the first write, if they are something else.
  if trace and not trace.key then
    redis.call('ZCARD', trace.claims)
  end
  if is_a_new_branch then
    redis.call('ZCARD', branch.kept)
    redis.call('ZCARD', branch.recent)
    redis.call('HLEN', branch.newest)
  end

  -- The indexes first and the events last: an index may name too much, never too little. If one of
  -- these calls fails, the aggregate still has no events, and its next append does them all again.
  -- The events can't fail any more, ZCARD has seen that their key is a sorted set.
  local number = next_commit()
  if count == 0 and not is_listed then
    redis.call('ZADD', domains, 0, domain)
    redis.call('ZADD', editions, 0, edition)
    is_listed = true
  end
  redis.call('ZADD', roots, number, root)
  if trace and trace.correlated then
    redis.call('ZADD', trace.correlated, 0, domain .. ':' .. edition .. ':' .. root)
  end
  if is_a_new_branch then
    diverge(branch, sequence)
  end
  if trace then
    local how_many = string.format(' %.0f', (last - first + 1) / 2)
    local claims = {}
    for _, what in ipairs(trace) do
      claims[#claims + 1] = '0'
      claims[#claims + 1] = claim_of(what, sequence) .. how_many
    end
    redis.call('ZADD', trace.claims, unpack(claims))
  end
  announce(root, sequence, (last - first + 1) / 2, add(events, sequence, first, last))
  return { 'ok', sequence }
end

-- Take the keys and arguments of an aggregate that not every one has.
local function take_branch()
  if edition == 'main' then
    return nil
  end
  local branch = {
    divergence = KEYS[key], main = KEYS[key + 1],
    newest = KEYS[key + 2], kept = KEYS[key + 3], recent = KEYS[key + 4],
  }
  key = key + 5
  return branch
end

local function take_trace(options)
  local letters = string.gsub(options, '[md]', '')
  if letters == '' then
    return nil
  end
  local trace = { claims = KEYS[key] }
  key = key + 1
  for letter in string.gmatch(letters, '.') do
    trace[#trace + 1] = ARGV[place]
    if letter == 'k' then
      trace.key = ARGV[place]
    elseif letter == 's' then
      trace.source = ARGV[place]
    elseif letter == 'c' then
      trace.correlated = KEYS[key]
      key = key + 1
    elseif letter == 'e' then
      trace.correlation = ARGV[place]
      trace.erasing, trace.erasures = KEYS[key], KEYS[key + 1]
      key = key + 2
    end
    place = place + 1
  end
  if trace.erasures then
    trace.known_erasures = ARGV[place]
    place = place + 1
  end
  return trace
end

-- Returns what `append` takes, of the next aggregate.
local function next_append()
  local root, expected = ARGV[place], tonumber(ARGV[place + 1])
  local count, options = ARGV[place + 2], ARGV[place + 3]
  local events = KEYS[key]
  key, place = key + 1, place + 4
  local branch = take_branch()
  local trace = options ~= '' and take_trace(options) or nil
  local first, last = place, place + 2 * count - 1
  place = last + 1
  return events, root, expected, first, last, options, branch, trace
end
