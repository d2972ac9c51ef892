#!lua
-- Records how far a handler has come in an aggregate.
-- KEYS: position, handlers; on another edition than main also divergence, attached (see keys.py)
-- ARGV: handler, sequence, 'forwards' or 'anywhere', root
-- Reply: {'ok'}, or {'behind'} when the position stands there or further, and forwards was asked
-- include: timeline.lua
-- include: positions.lua
local position, handlers, divergence, attached = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local handler, sequence, direction, root = ARGV[1], ARGV[2], ARGV[3], ARGV[4]

local diverged_at = divergence and divergence_of(divergence)
local current = tonumber(position_of(redis.call('GET', position), diverged_at))
redis.call('SCARD', handlers) -- fails here, before the first write, if it is not a set
if direction == 'forwards' and current and current >= tonumber(sequence) then
  return { 'behind' }
end
if attached then
  redis.call('ZADD', attached, 0, root)
end
redis.call('SADD', handlers, handler)
redis.call('SET', position, divergence and not diverged_at and sequence .. UNDIVERGED or sequence)
return { 'ok' }
