#!lua flags=allow-oom
-- Erases an aggregate, with all that belongs to it. Allowed when memory is full: it only deletes.
-- KEYS: events, newest, kept and recent snapshots, handlers, roots, editions, domains,
--       then the position of each handler that the caller knows of
-- ARGV: domain, edition, root, then the names of those handlers
-- Reply: {'ok', number of events}, or {'handlers', name, ...} when the caller knew of others
local events, newest, kept, recent = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local handlers, roots, editions, domains = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local domain, edition, root = ARGV[1], ARGV[2], ARGV[3]
local FIRST_POSITION, FIRST_HANDLER = 9, 4

local known = {}
for place = FIRST_HANDLER, #ARGV do
  known[ARGV[place]] = true
end
local names = redis.call('SMEMBERS', handlers)
for _, name in ipairs(names) do
  if not known[name] then
    table.insert(names, 1, 'handlers')
    return names
  end
end

local count = redis.call('ZCARD', events)
for _, index in ipairs({ roots, editions, domains }) do
  redis.call('ZCARD', index) -- fails here, before the first write, if it is not a sorted set
end
for place = FIRST_POSITION, #KEYS do
  redis.call('UNLINK', KEYS[place])
end
redis.call('UNLINK', events, newest, kept, recent, handlers)
redis.call('ZREM', roots, root)
if redis.call('EXISTS', roots) == 0 then
  redis.call('ZREM', editions, edition)
end
if redis.call('EXISTS', editions) == 0 then
  redis.call('ZREM', domains, domain)
end
return { 'ok', count }
