#!lua flags=no-writes
-- Finds the newest snapshot at or before a sequence.
-- KEYS: newest, kept, recent (see keys.py)
-- ARGV: sequence, or '' for the newest of all
-- Reply: {field, value, ...} of the hash, {member} of an older one, or {}
local newest, kept, recent = KEYS[1], KEYS[2], KEYS[3]
local at = ARGV[1]

local sequence = tonumber(redis.call('HGET', newest, 'sequence') or '')
if at == '' or (sequence and sequence <= tonumber(at)) then
  return redis.call('HGETALL', newest)
end
local found, found_at = {}, -1
for _, place in ipairs({ kept, recent }) do
  local older = redis.call('ZRANGE', place, at, '-inf', 'BYSCORE', 'REV', 'LIMIT', 0, 1, 'WITHSCORES')
  if older[1] and tonumber(older[2]) > found_at then
    found, found_at = { older[1] }, tonumber(older[2])
  end
end
return found
