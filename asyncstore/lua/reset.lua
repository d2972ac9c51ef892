#!lua
-- Puts a handler back, or forwards, in some aggregates. Leases end, and dead letters are forgotten.
-- KEYS: commits, due, dead letters, then for each aggregate position, lease, handlers, events; on another
--       edition than main also divergence, the events of main, attached (see keys.py)
-- ARGV: handler, how many keys each has, then for each root, and the sequence to begin at ('' for
--       its end)
-- Reply: {'ok'}
-- include: commit.lua
-- include: timeline.lua
-- include: leases.lua
-- include: handling.lua
local commits, due, dead = KEYS[1], KEYS[2], KEYS[3]
local handler, width = ARGV[1], tonumber(ARGV[2])
local FIRST_KEY, argument = 4, 3

redis.call('ZCARD', due) -- these fail here, before the first write, if they are something else
redis.call('ZCARD', dead)
take_commits(commits, 1) -- tells those who sweep that there is something to do
for place = FIRST_KEY, #KEYS, width do
  local position, lease, handlers, events = KEYS[place], KEYS[place + 1], KEYS[place + 2], KEYS[place + 3]
  local divergence, main, attached = nil, nil, nil
  if width > 4 then
    divergence, main, attached = KEYS[place + 4], KEYS[place + 5], KEYS[place + 6]
  end
  local root, start = ARGV[argument], tonumber(ARGV[argument + 1])
  local next_sequence, diverged_at = end_of(events, divergence, main)
  local at = (start or next_sequence) - 1
  if redis.call('EXISTS', lease) == 1 then
    redis.call('HSET', lease, 'holder', '', 'until', '0', 'by', '', 'of', '', 'tries', 0, 'again', '')
  end
  if at >= 0 then
    belong(handlers, attached, handler, root)
    advance(position, lease, at, id_of(member_at(events, main, diverged_at, at)))
  else
    redis.call('UNLINK', position)
    if redis.call('EXISTS', lease) == 1 then
      redis.call('HSET', lease, 'at', '', 'id', '')
    end
  end
  redis.call('ZREMRANGEBYLEX', dead, '[' .. root .. '\n', '(' .. root .. '\v')
  redis.call('ZADD', due, 0, root)
  argument = argument + 2
end
return { 'ok' }
