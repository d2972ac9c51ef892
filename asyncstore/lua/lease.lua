#!lua
-- Leases an aggregate to a worker of a handler, and reads the events after the handler's position.
-- KEYS: due, dead letters, position, lease, handlers, events; on another edition than main also
--       divergence, the events of main, attached (see keys.py)
-- ARGV: handler, root, holder: a name that no other lease has, how many microseconds it lasts,
--       limit of events, how often an event may be tried again ('' for ever),
--       the last sequence that the worker knows to be handled and the id there, or '' and '',
--       then, if not all are wanted, the types of events as they stand in a header
-- Reply: {'leased', token, how often the first event was handed out, first sequence that was looked
--         at, last one, the id there, where the timeline has diverged or '', member, member, ...},
--        {'again', the same} for a dead letter that is to be handled again,
--        {'idle'} when there is nothing to do, {'more'} when only others were found so far,
--        {'taken', microseconds until it ends} when another lease holds,
--        {'regressed', the sequence that should be next, the one that is},
--        or {'unreadable'} when the position is none
-- include: timeline.lua
-- include: positions.lua
-- include: page.lua
-- include: leases.lua
-- include: handling.lua
local due, dead, position, lease, handlers = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local events, divergence, main, attached = KEYS[6], KEYS[7], KEYS[8], KEYS[9]
local handler, root, holder, lasts = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local limit, most_tries = tonumber(ARGV[5]), (tonumber(ARGV[6]) or math.huge) + 1
local known, known_id = tonumber(ARGV[7]), ARGV[8]
local FIRST_TYPE = 9
local EXHAUSTED = 'its lease ended'

local now = now_of_server()
local about = about_lease(lease)
if about.ends > now and about.holder ~= holder then
  return { 'taken', about.ends - now }
end
local next_sequence, diverged_at = end_of(events, divergence, main)
local diverged = diverged_at and string.format('%.0f', diverged_at) or ''
local text = position_of(position, diverged_at)
local at = tonumber(text or -1)
redis.call('SCARD', handlers) -- these fail here, before the first write, if they are something else
redis.call('ZCARD', dead)

local function hold_back(...)
  redis.call('ZADD', due, now + lasts, root)
  return { ... }
end

-- Whether the event that was there, at the position or when the worker saw it, is another one now.
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

-- Returns what is handed out now: the members, and which sequences were looked at.
local function hand_out(tag, members, first, through, attempt)
  local last = members[#members]
  if tonumber(string.match(last or '', '^%[(%d+),')) ~= through then
    last = member_at(events, main, diverged_at, through)
  end
  local token = (about.token or 0) + 1
  if not about.token then
    belong(handlers, attached, handler, root)
  end
  local of = string.match(members[3] or '', '^%[(%d+),') or string.format('%.0f', first)
  redis.call('HSET', lease, 'holder', holder, 'until', string.format('%.0f', now + lasts),
    'token', token, 'of', of, 'tries', attempt)
  redis.call('ZADD', due, now + lasts, root)
  local reply = { tag, token, attempt, first, through, id_of(last), diverged }
  for place = 3, #members do
    reply[#reply + 1] = members[place]
  end
  return reply
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
    redis.call('ZADD', due, 0, root)
    return { 'more' }
  end
  redis.call('ZREM', due, root)
  return { 'idle' }
end

local again = tonumber(string.match(about.again, '^%d+'))
if again then
  local member = member_at(events, main, diverged_at, again)
  return hand_out('again', { '', '', member }, again, again, 1)
end

local types = {}
for place = FIRST_TYPE, #ARGV do
  types[#types + 1] = ARGV[place]
end

local function is_of_types(member)
  local _, place = string.find(member, '^%[%d+,%-?%d+,"%x+",')
  if not place then
    return true -- what can't be read is for the client to complain about
  end
  for _, name in ipairs(types) do
    local behind = place + #name + 1
    if string.sub(member, place + 1, behind - 1) == name
      and string.find(member, '^[%],]', behind) then
      return true
    end
  end
  return false
end

local found = { '', '' }
local parts = parts_of(events, main, diverged_at or FAR, at + 1, next_sequence)
page(found, parts, limit, false, #types > 0 and is_of_types or nil)
local through = found[1] == '' and next_sequence - 1 or tonumber(found[1])
if not found[3] then
  return pass_over(through)
end
local first = tonumber(string.match(found[3], '^%[(%d+),') or at + 1)
local was_tried = about.of == first
local attempt = was_tried and about.tries + (about.holder == holder and 0 or 1) or 1
if attempt > most_tries then
  -- Whoever had it has not even said that it failed.
  bury(dead, root, first, id_of(found[3]), attempt - 1, now, EXHAUSTED)
  return pass_over(first)
end
return hand_out('leased', found, at + 1, through, attempt)
