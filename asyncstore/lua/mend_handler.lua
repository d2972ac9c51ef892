#!lua
-- Puts a handler into the set of those that have a position or a lease in an aggregate, or takes it
-- out.
-- KEYS: handlers, position, lease (see keys.py)
-- ARGV: handler
-- Reply: {'added'}, {'removed'}, or {'right'} when it was as it should be
local handlers, position, lease = KEYS[1], KEYS[2], KEYS[3]
local handler = ARGV[1]

if redis.call('EXISTS', position, lease) > 0 then
  return { redis.call('SADD', handlers, handler) == 1 and 'added' or 'right' }
end
return { redis.call('SREM', handlers, handler) == 1 and 'removed' or 'right' }
