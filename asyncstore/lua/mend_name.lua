#!lua
-- Puts a name into an index if what it stands for is there, or takes it out.
-- KEYS: the index (roots, editions, domains or attached, see keys.py), then the keys that the name
--       stands for: one of them is enough; none for a name that can't be right
-- ARGV: name
-- Reply: {'added'}, {'removed'}, or {'right'} when it was as it should be
local index = KEYS[1]
local name = ARGV[1]

local is_there = false
for place = 2, #KEYS do
  is_there = is_there or redis.call('EXISTS', KEYS[place]) == 1
end
if is_there then
  return { redis.call('ZADD', index, 0, name) == 1 and 'added' or 'right' }
end
return { redis.call('ZREM', index, name) == 1 and 'removed' or 'right' }
