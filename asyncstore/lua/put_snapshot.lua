#!lua
-- Keeps a snapshot of an aggregate. The newest is a hash; an older one never takes its place.
-- KEYS: newest, kept, recent, events; on another edition than main also divergence, the events of
--       main, attached (see keys.py)
-- ARGV: sequence, retention ('default', 'persist', 'transient'), encoding, schema version,
--       the id in hexadecimal that the event at the sequence must have, or '', state,
--       how many older ones of retention default stay, root, its time in microseconds ('' for now)
-- Reply: {'ok'}, or {'stale'} when another event is there, or none
-- include: timeline.lua
local newest, kept, recent, events = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local divergence, main, attached = KEYS[5], KEYS[6], KEYS[7]
local sequence, retention, encoding, schema, as_of = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local state, recent_stay, root, time = ARGV[6], tonumber(ARGV[7]), ARGV[8], ARGV[9]

local function has_event(events, id)
  local member = redis.call('ZRANGE', events, sequence, sequence, 'BYSCORE')[1]
  return member and string.match(member, '^%[%d+,%-?%d+,"(%x+)"') == id
end

local function keep(old)
  local place = ({ persist = kept, default = recent })[old.retention]
  if not place then
    return
  end
  redis.call('ZREMRANGEBYSCORE', kept, old.sequence, old.sequence)
  redis.call('ZREMRANGEBYSCORE', recent, old.sequence, old.sequence)
  local head = '[' .. old.sequence .. ',' .. old.time .. ',"' .. old.retention .. '","' .. old.encoding .. '",' .. old.schema .. ']\n'
  redis.call('ZADD', place, old.sequence, head .. old.state)
  redis.call('ZREMRANGEBYRANK', recent, 0, -recent_stay - 1)
end

if as_of ~= '' then
  local is_of_main = main and tonumber(sequence) < (divergence_of(divergence) or FAR)
  if not has_event(is_of_main and main or events, as_of) then
    return { 'stale' }
  end
end
-- Their types are checked before the first write.
redis.call('ZCARD', kept)
redis.call('ZCARD', recent)
local fields = redis.call('HMGET', newest, 'sequence', 'time', 'retention', 'encoding', 'schema', 'state')
local current = {
  sequence = fields[1], time = fields[2], retention = fields[3], encoding = fields[4],
  schema = fields[5] or '0', state = fields[6],
}
local has_sequence = string.match(current.sequence or '', '^%d+$') and tonumber(current.sequence) < 2 ^ 53
local readable = has_sequence and current.time and current.retention and current.encoding and current.state

if time == '' then
  local clock = redis.call('TIME')
  time = clock[1] .. string.format('%06d', clock[2])
end
local put = {
  sequence = sequence, time = time, retention = retention, encoding = encoding, schema = schema, state = state,
}

if attached then
  redis.call('ZADD', attached, 0, root)
end
if readable and tonumber(sequence) < tonumber(current.sequence) then
  keep(put)
  return { 'ok' }
end
if readable and tonumber(sequence) > tonumber(current.sequence) then
  keep(current)
end
redis.call('UNLINK', newest)
redis.call('HSET', newest, 'sequence', sequence, 'time', time, 'retention', retention, 'encoding', encoding, 'schema', schema, 'state', state)
return { 'ok' }
