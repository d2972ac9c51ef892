#!lua flags=allow-oom
-- Erases an aggregate, with all that belongs to it. Allowed when memory is full: it only deletes.
-- KEYS: events, newest, kept and recent snapshots, handlers, claims, divergence, roots, editions,
--       domains, attached (see keys.py), then the position of each handler that the caller knows of,
--       then the index of each correlation id that it knows of
-- ARGV: domain, edition, root, how many handlers, their names, then those correlation ids
-- Reply: {'ok', number of events}, or {'more', {handler, ...}, {correlation id, ...}}, all there are,
--        when the caller did not know of one
local events, newest, kept, recent, handlers = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local claims, divergence = KEYS[6], KEYS[7]
local roots, editions, domains, attached = KEYS[8], KEYS[9], KEYS[10], KEYS[11]
local domain, edition, root, known_handlers = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local FIRST_KNOWN_KEY, FIRST_KNOWN = 12, 5
local CORRELATION = 'correlation:' -- see keys.py

-- Returns the correlation ids that have claims here: looks at the first claim of each.
local function correlation_ids()
  local ids, from = {}, '[' .. CORRELATION
  while true do
    local claim = redis.call('ZRANGE', claims, from, '(correlation;', 'BYLEX', 'LIMIT', 0, 1)[1]
    if not claim then
      return ids
    end
    ids[#ids + 1] = string.match(claim, '^' .. CORRELATION .. '([^\n]*)\n')
    from = '(' .. CORRELATION .. ids[#ids] .. '\v'
  end
end

local known = {}
for place = FIRST_KNOWN, #ARGV do
  local is_handler = place < FIRST_KNOWN + known_handlers
  known[(is_handler and 'handler:' or CORRELATION) .. ARGV[place]] = true
end
local names, ids = redis.call('SMEMBERS', handlers), correlation_ids()
for _, name in ipairs(names) do
  if not known['handler:' .. name] then
    return { 'more', names, ids }
  end
end
for _, id in ipairs(ids) do
  if not known[CORRELATION .. id] then
    return { 'more', names, ids }
  end
end

local count = redis.call('ZCARD', events)
-- These fail here, before the first write, if an index is not a sorted set.
for place = 8, 11 do
  redis.call('ZCARD', KEYS[place])
end
for place = FIRST_KNOWN_KEY + known_handlers, #KEYS do
  redis.call('ZCARD', KEYS[place])
end
for place = FIRST_KNOWN_KEY, #KEYS do
  if place < FIRST_KNOWN_KEY + known_handlers then
    redis.call('UNLINK', KEYS[place])
  else
    redis.call('ZREM', KEYS[place], domain .. ':' .. edition .. ':' .. root)
  end
end
redis.call('UNLINK', events, newest, kept, recent, handlers, claims, divergence)
redis.call('ZREM', attached, root)
redis.call('ZREM', roots, root)
if redis.call('EXISTS', roots) == 0 then
  redis.call('ZREM', editions, edition)
end
if redis.call('EXISTS', editions) == 0 then
  redis.call('ZREM', domains, domain)
end
return { 'ok', count }
