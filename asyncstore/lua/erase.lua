#!lua flags=allow-oom
-- Takes an erased aggregate out of the indexes of correlation ids, and tells which come next.
-- KEYS: erasing, claims, attached, handlers, newest snapshot, erasures (see keys.py), then the index of
--       each correlation id that is to be done now; on a cluster these are in other slots, not among
--       the keys, and were done before
-- ARGV: domain, edition, root, those correlation ids
-- Reply: {count of erasures, correlation id, ...}, the next ones; none when all is done
-- include: correlations.lua
local erasing, claims, attached, handlers, newest = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local erasures = KEYS[6]
local domain, edition, root = ARGV[1], ARGV[2], ARGV[3]
local FIRST_INDEX, FIRST_ID = 7, 4
local were_elsewhere = #KEYS < FIRST_INDEX and #ARGV >= FIRST_ID

count_of(erasures) -- fails here, before the first write, if it is something else
for place = FIRST_ID, #ARGV do
  local id, index = ARGV[place], KEYS[place - FIRST_ID + FIRST_INDEX]
  local from, to = '[' .. CORRELATION .. id .. '\n', '(' .. CORRELATION .. id .. '\v'
  -- Unless it was appended with the same id again.
  if index and #redis.call('ZRANGE', claims, from, to, 'BYLEX', 'LIMIT', 0, 1) == 0 then
    redis.call('ZREM', index, domain .. ':' .. edition .. ':' .. root)
  end
  redis.call('ZREMRANGEBYLEX', erasing, from, to)
end

if were_elsewhere then
  redis.call('INCR', erasures) -- appends that wrote to such an index before have to do it again
end
local ids = correlation_ids(erasing)
if #ids == 0 then
  redis.call('UNLINK', erasing)
  if redis.call('EXISTS', handlers, newest) == 0 then
    redis.call('ZREM', attached, root)
  end
end
return { string.format('%.0f', count_of(erasures)), unpack(ids) }
