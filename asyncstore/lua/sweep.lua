#!lua
-- Puts aggregates that a handler is behind in among those that are due. Where it marks where the
-- handler begins, those get a position that have none; that is done once for a tag.
-- KEYS: subscription, due, then for each aggregate position, lease, handlers, events; on another
--       edition than main also divergence, the events of main, attached (see keys.py)
-- ARGV: handler, 'mark' or '', the number of the commit up to which roots were looked at, the number
--       up to which they are now, 'last' if there were no more when these were read or '', how many
--       keys each has, then for each root, and the sequence at which to begin there ('' for its end)
-- Reply: {'swept', 'behind' if the handler is behind in one of them or ''};
--        {'moved'} when somebody else has looked at them meanwhile;
--        or {'marked'} when all have their mark
-- include: timeline.lua
-- include: positions.lua
-- include: leases.lua
-- include: handling.lua
-- include: later.lua
local subscription, due = KEYS[1], KEYS[2]
local handler, is_marking, from, to = ARGV[1], ARGV[2] == 'mark', ARGV[3], ARGV[4]
local is_last, width = ARGV[5] == 'last', tonumber(ARGV[6])
local FIRST_KEY, FIRST_ARGUMENT = 3, 7

local known = redis.call('HMGET', subscription, 'marked', 'swept')
if is_marking and known[1] then
  return { 'marked' }
end
if (known[2] or '0') ~= from then
  return { 'moved' }
end
redis.call('ZCARD', due) -- fails here, before the first write, if it is something else

local function is_behind(place, root, start)
  local position, lease, handlers, events = KEYS[place], KEYS[place + 1], KEYS[place + 2], KEYS[place + 3]
  local divergence, main, attached = nil, nil, nil
  if width > 4 then
    divergence, main, attached = KEYS[place + 4], KEYS[place + 5], KEYS[place + 6]
  end
  if not is_marking and not divergence and value_at(position) == false then
    return true -- the index names what has events
  end
  local next_sequence, diverged_at = end_of(events, divergence, main)
  local at = tonumber(position_of(value_at(position), diverged_at) or -1)
  if is_marking and at == -1 then
    at = (tonumber(start) or next_sequence) - 1
    if at >= 0 then
      belong(handlers, attached, handler, root)
      advance(position, lease, at, id_of(member_at(events, main, diverged_at, at)))
    end
  end
  return not at or at + 1 ~= next_sequence
end

local positions, behind, argument = {}, {}, FIRST_ARGUMENT
for place = FIRST_KEY, #KEYS, width do
  positions[#positions + 1] = KEYS[place]
end
if #positions > 0 then
  read_positions(positions)
end
for place = FIRST_KEY, #KEYS, width do
  local root = ARGV[argument]
  -- What is wrong with one is found again, and told, when it is leased.
  local done, is_one = pcall(is_behind, place, root, ARGV[argument + 1])
  if not done or is_one then
    behind[#behind + 1] = 0
    behind[#behind + 1] = root
  end
  argument = argument + 2
end
in_parts(behind, function(...) redis.call('ZADD', due, 'NX', ...) end)
redis.call('HSET', subscription, 'swept', to)
if is_marking and is_last then
  redis.call('HSET', subscription, 'marked', 1)
  return { 'marked' }
end
return { 'swept', #behind > 0 and 'behind' or '' }
