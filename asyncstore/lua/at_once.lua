-- What later.lua does for many aggregates together, done at once: a script of one has nothing to
-- collect, and does not pay for it. It goes by `due`, which the script before it has named.

local function value_at(position)
  return redis.call('GET', position)
end

local function move(position, sequence)
  redis.call('SET', position, string.format('%.0f', sequence))
end

local function make_due(moment, root)
  redis.call('ZADD', due, moment, root)
end

local function drop(root)
  redis.call('ZREM', due, root)
end
