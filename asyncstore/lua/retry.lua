#!lua
-- Takes a dead letter away: to have its event handled again, or for good.
-- KEYS: commits, due, dead letters, lease (see keys.py)
-- ARGV: root, the letter, the sequence to handle again or '' for none
-- Reply: {'ok'}, or {'gone'} when there is no such letter any more
-- include: commit.lua
local commits, due, dead, lease = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local root, letter, sequence = ARGV[1], ARGV[2], ARGV[3]

redis.call('ZCARD', due) -- these fail here, before the first write, if they are something else
take_commits(commits, 1) -- tells those who sweep that there is something to do
local again = redis.call('HGET', lease, 'again') or ''
if redis.call('ZREM', dead, letter) == 0 then
  return { 'gone' }
end
if sequence ~= '' then
  redis.call('HSET', lease, 'again', again == '' and sequence or again .. ' ' .. sequence)
  if redis.call('HGET', lease, 'of') == sequence then
    redis.call('HSET', lease, 'tries', 0) -- its tries before it became a dead letter
  end
  redis.call('ZADD', due, 'NX', 0, root)
end
return { 'ok' }
