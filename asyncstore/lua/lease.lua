#!lua
-- Leases aggregates to a worker of a handler, and reads the events after the handler's positions.
-- Each aggregate by itself: what is wrong with one does not touch the others.
-- KEYS: due, dead letters, then for each aggregate position, lease, handlers, events; on another
--       edition than main also divergence, the events of main, attached (see keys.py)
-- ARGV: handler, how many microseconds leases last, limit of events of an aggregate, how often an
--       event may be tried again ('' for ever), how many keys each aggregate has,
--       how many types of events are wanted, 0 for all, and these as they stand in a header,
--       then for each aggregate: root, holder: a name that no other lease has,
--         the last sequence that the worker knows to be handled and the id there, or '' and ''
-- Reply: for each aggregate
--        {'leased', token, how often the first event was handed out, its sequence, the last one that
--         was looked at, the id there if that is no member, where the timeline has diverged or '',
--         {member, ...}},
--        {'again', the same} for a dead letter that is to be handled again,
--        {'idle'} when there is nothing to do, {'more'} when only others were found so far, or those
--        of the aggregates before it have filled the reply,
--        {'taken', microseconds until it ends} when another lease holds,
--        {'regressed', the sequence that should be next, the one that is},
--        {'unreadable'} when the position is none,
--        or {'error', first word of the server's error}
-- include: timeline.lua
-- include: positions.lua
-- include: page.lua
-- include: leases.lua
-- include: handling.lua
-- include: failing.lua
-- include: later.lua
local due, dead = KEYS[1], KEYS[2]
local handler, lasts, limit = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
-- The first try is counted before it is known to have begun: a lease that has ended buries nothing yet.
local most_leases = math.max(tonumber(ARGV[4]) or math.huge, 1) + 1
local width, count_of_types = tonumber(ARGV[5]), tonumber(ARGV[6])
local FIRST_KEY, FIRST_TYPE = 3, 7
local LARGE = 2048 -- bytes of an event
local EXHAUSTED = 'its lease ended'

local now = now_of_server()
local ends = string.format('%.0f', now + lasts)
redis.call('ZCARD', due) -- these fail here, before the first write, if they are something else
redis.call('ZCARD', dead)
local bytes, events_read = 0, 0

-- Returns how many events to read first: many where those of other aggregates are small.
local function first_chunk()
  return bytes < events_read * LARGE and LARGEST_CHUNK or FIRST_CHUNK
end

local function is_of_types(member)
  local _, place = string.find(member, '^%[%d+,%-?%d+,"%x+",')
  if not place then
    return true -- what can't be read is for the client to complain about
  end
  for argument = FIRST_TYPE, FIRST_TYPE + count_of_types - 1 do
    local name = ARGV[argument]
    local behind = place + #name + 1
    if string.sub(member, place + 1, behind - 1) == name
      and string.find(member, '^[%],]', behind) then
      return true
    end
  end
  return false
end

local function lease_one(key, root, holder, known, known_id)
  local position, lease, handlers, events = KEYS[key], KEYS[key + 1], KEYS[key + 2], KEYS[key + 3]
  local divergence, main, attached
  if width > 4 then
    divergence, main, attached = KEYS[key + 4], KEYS[key + 5], KEYS[key + 6]
  end
  local about = about_lease(lease)
  if about.ends > now and about.holder ~= holder then
    return { 'taken', about.ends - now }
  end
  local next_sequence, diverged_at = end_of(events, divergence, main)
  local text = position_of(value_at(position), diverged_at)
  local at = tonumber(text or -1)

  local function hold_back(...)
    make_due(ends, root)
    return { ... }
  end

  -- Whether the event that was there, at the position or when the worker saw it, is another now.
  local function is_other(sequence, id)
    return id ~= '' and id_of(member_at(events, main, diverged_at, sequence)) ~= id
  end

  if not at then
    return hold_back('unreadable')
  end
  if at >= next_sequence then
    return hold_back('regressed', at + 1, next_sequence)
  end
  if about.at == at and is_other(at, about.id or '') then
    return hold_back('regressed', at + 1, at)
  end
  -- An aggregate that was deleted has no lease any more, and may begin anew.
  if about.token and known and known > at and is_other(known, known_id) then
    return hold_back('regressed', known + 1, math.min(known, next_sequence))
  end

  -- Returns what is handed out now: the members, the first sequence, and how far was looked.
  local function hand_out(tag, found, first, through, attempt)
    local members, id = {}, ''
    for place = 3, #found do
      members[place - 2] = found[place]
    end
    if tonumber(string.match(members[#members] or '', '^%[(%d+),')) ~= through then
      id = id_of(member_at(events, main, diverged_at, through))
    end
    local token = (about.token or 0) + 1
    if not about.token then
      belong(handlers, attached, handler, root)
    end
    redis.call('HSET', lease, 'holder', holder, 'until', ends, 'token', token,
      'of', string.format('%.0f', first), 'tries', attempt)
    if attempt > 1 or about.waits then
      redis.call('HSET', lease, 'waits', attempt > 1 and '1' or '')
    end
    make_due(ends, root)
    local diverged = diverged_at and string.format('%.0f', diverged_at) or ''
    return { tag, token, attempt, first, through, id, diverged, members }
  end

  -- Goes on behind what was passed over, or ends when there is nothing left.
  local function pass_over(through)
    if through > at then
      belong(handlers, attached, handler, root)
      advance(position, lease, through, id_of(member_at(events, main, diverged_at, through)))
    end
    if about.token then
      redis.call('HSET', lease, 'holder', '', 'until', '0')
    end
    if through + 1 < next_sequence then
      make_due(0, root)
      return { 'more' }
    end
    drop(root)
    return { 'idle' }
  end

  -- What only waited to be handed out when its worker died was not tried.
  local function attempt_at(first)
    local was_tried, is_counted = about.of == first, about.waits or about.holder == holder
    return was_tried and about.tries + (is_counted and 0 or 1) or 1
  end

  local again, others = string.match(about.again, '^(%d+) ?(.*)')
  again = tonumber(again)
  if again then
    local member, attempt = member_at(events, main, diverged_at, again), attempt_at(again)
    if attempt > most_leases then
      bury(dead, root, again, id_of(member), attempt - 1, now, EXHAUSTED)
      redis.call('HSET', lease, 'holder', '', 'until', '0', 'again', others)
      make_due(0, root)
      return { 'more' }
    end
    bytes = bytes + #(member or '')
    return hand_out('again', { '', '', member }, again, again, attempt)
  end

  local found = { '', '' }
  local parts = parts_of(events, main, diverged_at or FAR, at + 1, next_sequence)
  local is_wanted = count_of_types > 0 and is_of_types or nil
  bytes = bytes + page(found, parts, limit, false, is_wanted, first_chunk())
  events_read = events_read + #found - 2
  local through = found[1] == '' and next_sequence - 1 or tonumber(found[1])
  local is_hole = count_of_types == 0 and through > at -- for the client to complain about
  if not found[3] and not is_hole then
    return pass_over(through)
  end
  -- Without types it is what comes next, also if that is missing and another was found.
  local named = count_of_types > 0 and string.match(found[3], '^%[(%d+),')
  local first = tonumber(named or at + 1)
  local attempt = attempt_at(first)
  if attempt > most_leases then
    -- Whoever had it has not even said that it failed.
    redis.call('SCARD', handlers) -- fails here, before the first write, if it is something else
    bury(dead, root, first, id_of(member_at(events, main, diverged_at, first)), attempt - 1, now,
      EXHAUSTED)
    return pass_over(first)
  end
  return hand_out('leased', found, first, through, attempt)
end

-- Does for an aggregate on main that the handler never had what lease_one would do, if one chunk holds
-- all there is, in two thirds of the time: a handler that begins has little else to do.
local function lease_afresh(key, root, holder)
  local position, lease, handlers, events = KEYS[key], KEYS[key + 1], KEYS[key + 2], KEYS[key + 3]
  if value_at(position) or redis.call('EXISTS', lease) > 0 then
    return nil
  end
  local size = math.min(limit, first_chunk())
  local members = redis.call('ZRANGE', events, 0, size - 1)
  local count = #members
  if count == 0 or (count == size and size < limit) then
    return nil
  end
  for place = 1, count do
    bytes = bytes + #members[place]
  end
  events_read = events_read + count
  belong(handlers, nil, handler, root)
  redis.call('HSET', lease, 'holder', holder, 'until', ends, 'token', 1, 'of', 0, 'tries', 1)
  make_due(ends, root)
  return { 'leased', 1, 1, 0, count - 1, '', '', members }
end

local is_plain = width == 4 and count_of_types == 0

local function lease_any(key, place)
  local root, holder = ARGV[place], ARGV[place + 1]
  return is_plain and lease_afresh(key, root, holder)
    or lease_one(key, root, holder, tonumber(ARGV[place + 2]), ARGV[place + 3])
end

local positions, replies, argument = {}, {}, FIRST_TYPE + count_of_types
for key = FIRST_KEY, #KEYS, width do
  positions[#positions + 1] = KEYS[key]
end
read_positions(positions)
for key = FIRST_KEY, #KEYS, width do
  if bytes < BYTES_A_PAGE then
    local done, reply = pcall(lease_any, key, argument)
    replies[#replies + 1] = done and reply or failure_of(reply)
  else
    replies[#replies + 1] = { 'more' }
  end
  argument = argument + 4
end
write_all(due)
return replies
