#!lua
-- Raises the number of the last commit to the highest one that an index of roots has.
-- KEYS: commits, roots (see keys.py)
-- Reply: {'added'}, or {'right'} when it was as it should be
-- include: commit.lua
local commits, roots = KEYS[1], KEYS[2]

local highest = tonumber(redis.call('ZRANGE', roots, 0, 0, 'REV', 'WITHSCORES')[2] or 0)
local last = tonumber(string.match(redis.call('GET', commits) or '0', '^%d+'))
if highest <= last then
  return { 'right' }
end
take_commits(commits, highest - last)
return { 'added' }
