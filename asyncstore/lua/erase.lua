#!lua flags=allow-oom
-- Takes an erased aggregate out of the indexes of correlation ids, and tells which come next.
-- KEYS: erasing, claims, attached, handlers, newest snapshot (see keys.py), then the index of each
--       correlation id that is to be done now
-- ARGV: domain, edition, root, those correlation ids
-- Reply: {correlation id, ...}, the next ones; none when all is done
-- include: correlations.lua
local erasing, claims, attached, handlers, newest = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local domain, edition, root = ARGV[1], ARGV[2], ARGV[3]
local FIRST_INDEX, FIRST_ID = 6, 4

for place = FIRST_INDEX, #KEYS do
  local id = ARGV[place - FIRST_INDEX + FIRST_ID]
  local from, to = '[' .. CORRELATION .. id .. '\n', '(' .. CORRELATION .. id .. '\v'
  -- Unless it was appended with the same id again.
  if #redis.call('ZRANGE', claims, from, to, 'BYLEX', 'LIMIT', 0, 1) == 0 then
    redis.call('ZREM', KEYS[place], domain .. ':' .. edition .. ':' .. root)
  end
  redis.call('ZREMRANGEBYLEX', erasing, from, to)
end

local ids = correlation_ids(erasing)
if #ids == 0 then
  redis.call('UNLINK', erasing)
  if redis.call('EXISTS', handlers, newest) == 0 then
    redis.call('ZREM', attached, root)
  end
end
return ids
