#!lua
-- Lets an aggregate leave main on an edition, before it has events there.
-- KEYS: commits, roots, editions, domains, events, divergence, the events of main,
--       newest, kept and recent snapshots (see keys.py)
-- ARGV: domain, edition, root, the sequence to diverge at
-- Reply: {'ok', that sequence}, {'exists', where it has diverged},
--        or {'conflict', the next sequence of main} when that is less
-- include: commit.lua
-- include: timeline.lua
-- include: diverge.lua
local commits, roots, editions, domains = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local events, main = KEYS[5], KEYS[7]
local branch = { divergence = KEYS[6], newest = KEYS[8], kept = KEYS[9], recent = KEYS[10] }
local domain, edition, root, at = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])

local diverged_at = divergence_of(branch.divergence)
redis.call('ZCARD', events) -- fails here, before the first write, if it is not a sorted set
if diverged_at then
  return { 'exists', diverged_at }
end
local next_of_main = redis.call('ZCARD', main)
if at > next_of_main then
  return { 'conflict', next_of_main }
end
local number = take_commits(commits, 1)
redis.call('ZADD', domains, 0, domain)
redis.call('ZADD', editions, 0, edition)
redis.call('ZADD', roots, number, root)
diverge(branch, at)
return { 'ok', at }
