-- What the aggregates of a call have in common, in one command for all: a command of a script costs
-- more than what it does. Whatever could refuse these writes has to be looked at before.

local VALUES = 1000 -- that go in one command; even

local function in_parts(values, carry_out)
  for first = 1, #values, VALUES do
    carry_out(unpack(values, first, math.min(first + VALUES - 1, #values)))
  end
end

local known_positions = {}
local moved_positions, due_moments, done_roots = {}, {}, {}

-- Reads positions, if all are what they should be; those of another type are read one by one.
local function read_positions(keys)
  local values, absent = redis.call('MGET', unpack(keys)), {}
  for place, key in ipairs(keys) do
    known_positions[key] = values[place]
    if not values[place] then
      absent[#absent + 1] = key
    end
  end
  if #absent > 0 and redis.call('EXISTS', unpack(absent)) > 0 then
    for _, key in ipairs(absent) do
      known_positions[key] = nil
    end
  end
end

-- Returns what is at the key of a position, false where there is nothing.
local function value_at(position)
  local value = known_positions[position]
  if value == nil then
    return redis.call('GET', position)
  end
  return value
end

-- Moves a position.
local function move(position, sequence)
  local score = string.format('%.0f', sequence)
  known_positions[position] = score
  moved_positions[#moved_positions + 1] = position
  moved_positions[#moved_positions + 1] = score
end

-- Has an aggregate looked at from a moment on.
local function make_due(moment, root)
  due_moments[#due_moments + 1] = moment
  due_moments[#due_moments + 1] = root
end

-- Has an aggregate looked at no more, until it changes.
local function drop(root)
  done_roots[#done_roots + 1] = root
end

-- Writes what was said above.
local function write_all(due)
  in_parts(due_moments, function(...) redis.call('ZADD', due, ...) end)
  in_parts(done_roots, function(...) redis.call('ZREM', due, ...) end)
  in_parts(moved_positions, function(...) redis.call('MSET', ...) end)
end
