-- What the acks of going_on.lua and acking.lua have in common; it goes by the names that these go by.
local goes_on = following ~= '' and following ~= 'keep' -- with the lease

-- Moves the position, if that is behind, and notes who has done so, with other fields of the lease.
local function note(at, ...)
  if at < through then
    move(position, through)
    redis.call('HSET', lease, 'at', string.format('%.0f', through), 'id', id, 'by', holder, ...)
  else
    redis.call('HSET', lease, 'by', holder, ...)
  end
end
