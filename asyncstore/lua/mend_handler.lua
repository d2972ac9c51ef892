#!lua
-- Puts a handler into the set of those that have a position in an aggregate, or takes it out.
-- KEYS: handlers, position (see keys.py)
-- ARGV: handler
-- Reply: {'added'}, {'removed'}, or {'right'} when it was as it should be
local handlers, position = KEYS[1], KEYS[2]
local handler = ARGV[1]

if redis.call('EXISTS', position) == 1 then
  return { redis.call('SADD', handlers, handler) == 1 and 'added' or 'right' }
end
return { redis.call('SREM', handlers, handler) == 1 and 'removed' or 'right' }
