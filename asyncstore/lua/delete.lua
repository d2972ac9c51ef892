#!lua flags=allow-oom
-- Erases an aggregate, with all that belongs to it. Allowed when memory is full: it only deletes.
-- What is left for erase.lua are its entries in the indexes of correlation ids: those may be many,
-- and an index may name too much. Its claims are kept aside until then.
-- KEYS: events, newest, kept and recent snapshots, handlers, claims, erasing, divergence, roots,
--       editions, domains, attached, erasures (see keys.py), then for each handler that the caller
--       knows of position, lease, due, dead letters
-- ARGV: domain, edition, root, the names of those handlers
-- Reply: {'ok', number of events, {correlation id, ...}, count of erasures}, the first ids that are
--        left to erase, or {'more', {handler, ...}}, all there are, when the caller did not know of
--        one
-- include: correlations.lua
local events, newest, kept, recent, handlers = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local claims, erasing, divergence = KEYS[6], KEYS[7], KEYS[8]
local roots, editions, domains, attached = KEYS[9], KEYS[10], KEYS[11], KEYS[12]
local erasures = KEYS[13]
local domain, edition, root = ARGV[1], ARGV[2], ARGV[3]
local FIRST_INDEX, LAST_INDEX, FIRST_POSITION, FIRST_HANDLER = 9, 12, 14, 4
local KEYS_OF_A_HANDLER = 4

local known = {}
for place = FIRST_HANDLER, #ARGV do
  known[ARGV[place]] = true
end
local names = redis.call('SMEMBERS', handlers)
for _, name in ipairs(names) do
  if not known[name] then
    return { 'more', names }
  end
end

local count = redis.call('ZCARD', events)
count_of(erasures) -- these fail here, before the first write, if they are something else
redis.call('ZCARD', claims)
for place = FIRST_INDEX, LAST_INDEX do
  redis.call('ZCARD', KEYS[place])
end
for place = FIRST_POSITION, #KEYS, KEYS_OF_A_HANDLER do
  local due, dead = KEYS[place + 2], KEYS[place + 3]
  redis.call('ZCARD', due)
  redis.call('ZCARD', dead)
end
if redis.call('ZCARD', erasing) > 0 then
  redis.call('ZUNIONSTORE', erasing, 2, erasing, claims, 'WEIGHTS', 0, 0) -- one was cut off before
elseif redis.call('EXISTS', claims) == 1 then
  redis.call('RENAME', claims, erasing)
end
local ids = correlation_ids(erasing)
for place = FIRST_POSITION, #KEYS, KEYS_OF_A_HANDLER do
  local position, lease, due, dead = KEYS[place], KEYS[place + 1], KEYS[place + 2], KEYS[place + 3]
  redis.call('UNLINK', position, lease)
  redis.call('ZREM', due, root)
  redis.call('ZREMRANGEBYLEX', dead, '[' .. root .. '\n', '(' .. root .. '\v')
end
redis.call('UNLINK', events, newest, kept, recent, handlers, claims, divergence)
if #ids > 0 then
  redis.call('ZADD', attached, 0, root) -- whoever deletes the edition finds what was cut off
else
  redis.call('UNLINK', erasing)
  redis.call('ZREM', attached, root)
end
redis.call('ZREM', roots, root)
if redis.call('EXISTS', roots) == 0 then
  redis.call('ZREM', editions, edition)
end
if redis.call('EXISTS', editions) == 0 then
  redis.call('ZREM', domains, domain)
end
return { 'ok', count, ids, count_of(erasures) }
