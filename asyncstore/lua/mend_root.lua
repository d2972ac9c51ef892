#!lua
-- Puts an aggregate into the index of roots if it has events or has left main, with a number of its
-- own, or takes it out.
-- KEYS: commits, roots, events, divergence (see keys.py)
-- ARGV: root
-- Reply: {'added'}, {'removed'}, or {'right'} when it was as it should be
-- include: commit.lua
local commits, roots, events, divergence = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local root = ARGV[1]

local MAX_SEQUENCE = 9007199254740991

local function is_number_of_one(score)
  local number = tonumber(score)
  local is_number = number > 0 and number <= MAX_SEQUENCE and number == math.floor(number)
  return is_number and redis.call('ZCOUNT', roots, score, score) == 1
end

local is_listed = redis.call('ZSCORE', roots, root)
local is_there = redis.call('EXISTS', events, divergence) > 0
if is_there and not (is_listed and is_number_of_one(is_listed)) then
  local number = take_commits(commits, 1)
  redis.call('ZADD', roots, number, root)
  return { 'added' }
end
if is_listed and not is_there then
  redis.call('ZREM', roots, root)
  return { 'removed' }
end
return { 'right' }
