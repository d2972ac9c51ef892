-- Changes what the store keeps of a handler's work on one aggregate; see leases.lua.

-- Lets whoever deletes the aggregate know that the handler has something here. `attached` is nil on
-- main.
local function belong(handlers, attached, handler, root)
  if redis.call('SADD', handlers, handler) == 1 and attached then
    redis.call('ZADD', attached, 0, root)
  end
end

-- Moves the position to an event, and remembers which one that is.
local function advance(position, lease, sequence, id)
  local score = string.format('%.0f', sequence)
  redis.call('SET', position, score)
  redis.call('HSET', lease, 'at', score, 'id', id)
end

-- Puts an event among those that are left for a person to look at.
local function bury(dead, root, sequence, id, tries, now, reason)
  local letter = string.format('\n%016.0f %s %.0f %.0f ', sequence, id, tries, now)
  redis.call('ZADD', dead, 0, root .. letter .. reason)
end
