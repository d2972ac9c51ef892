#!lua
-- Records how far a handler has come in an aggregate.
-- KEYS: position, handlers
-- ARGV: handler, sequence, 'forwards' or 'anywhere'
-- Reply: {'ok'}, or {'behind'} when the position stands there or further, and forwards was asked
local position, handlers = KEYS[1], KEYS[2]
local handler, sequence, direction = ARGV[1], ARGV[2], ARGV[3]

local current = tonumber(redis.call('GET', position) or '')
redis.call('SCARD', handlers) -- fails here, before the first write, if it is not a set
if direction == 'forwards' and current and current >= tonumber(sequence) then
  return { 'behind' }
end
redis.call('SADD', handlers, handler)
redis.call('SET', position, sequence)
return { 'ok' }
