#!lua
-- Raises the number of the last commit to the highest one that an index of roots has.
-- KEYS: commits, roots (see keys.py)
-- Reply: {'added'}, or {'right'} when it was as it should be
-- include: commit.lua
local commits, roots = KEYS[1], KEYS[2]

local MAX_SEQUENCE = '9007199254740991' -- what is beyond is no number of a commit
local by = { 'BYSCORE', 'REV', 'LIMIT', 0, 1, 'WITHSCORES' }

local highest = tonumber(redis.call('ZRANGE', roots, MAX_SEQUENCE, 0, unpack(by))[2] or 0)
local last = tonumber(string.match(redis.call('GET', commits) or '0', '^%d+'))
if highest <= last then
  return { 'right' }
end
take_commits(commits, highest - last)
return { 'added' }
