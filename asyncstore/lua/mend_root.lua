#!lua
-- Puts an aggregate into the index of roots if it has events or has left main, or takes it out.
-- KEYS: commits, roots, events, divergence (see keys.py)
-- ARGV: root
-- Reply: {'added'}, {'removed'}, or {'right'} when it was as it should be
-- include: commit.lua
local commits, roots, events, divergence = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local root = ARGV[1]

local is_listed = redis.call('ZSCORE', roots, root)
local is_there = redis.call('EXISTS', events, divergence) > 0
if is_there and not is_listed then
  local number = take_commits(commits, 1)
  redis.call('ZADD', roots, number, root)
  return { 'added' }
end
if is_listed and not is_there then
  redis.call('ZREM', roots, root)
  return { 'removed' }
end
return { 'right' }
