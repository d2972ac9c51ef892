#!lua
-- Claims events for a key, a source or a correlation id that they carry, if they are still there.
-- KEYS: events, claims (see keys.py)
-- ARGV: what is claimed, the first sequence, the last, the ids in hexadecimal of the events there
-- Reply: {'added'}, {'right'} when all was there, or {'changed'} when these events are not there
-- include: claims.lua
local events, claims = KEYS[1], KEYS[2]
local what, first, last = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local first_id, last_id = ARGV[4], ARGV[5]

local function has_event(score, id)
  local member = redis.call('ZRANGE', events, score, score, 'BYSCORE')[1]
  return member and string.match(member, '^%[%d+,%-?%d+,"(%x+)"') == id
end

local count = last - first + 1
local is_whole = redis.call('ZCOUNT', events, ARGV[2], ARGV[3]) == count
if not (is_whole and has_event(ARGV[2], first_id) and has_event(ARGV[3], last_id)) then
  return { 'changed' }
end
redis.call('ZCARD', claims) -- fails here, before the first write, if it is something else
local claim = string.format('%s %.0f', claim_of(what, first), count)
return { redis.call('ZADD', claims, 0, claim) > 0 and 'added' or 'right' }
