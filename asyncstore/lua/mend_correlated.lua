#!lua
-- Has the index of a correlation id name an aggregate. It may name too much.
-- KEYS: the index (see keys.py)
-- ARGV: what names the aggregate
-- Reply: {'added'}, or {'right'} when it was there
local index = KEYS[1]
local place = ARGV[1]

return { redis.call('ZADD', index, 0, place) == 1 and 'added' or 'right' }
