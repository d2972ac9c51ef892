#!lua
-- Records that an event could not be handled: it comes again after a while, or becomes a dead letter
-- when it was tried too often, and the aggregate goes on behind it.
-- KEYS: due, dead letters, position, lease (see keys.py)
-- ARGV: root, holder, sequence of the event, its id, microseconds to wait,
--       how often it may be tried again ('' for ever), why it failed,
--       'again' for a dead letter that was tried again, or ''
-- Reply: {'ok'}, {'buried'}, {'acked'} when it was acked after all and does not come again, or {'lost'}
--        when the lease is not the worker's own any more
-- include: leases.lua
-- include: handling.lua
local due, dead, position, lease = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local root, holder, sequence, id = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local delay, most_tries = tonumber(ARGV[5]), (tonumber(ARGV[6]) or math.huge) + 1
local reason, is_again = ARGV[7], ARGV[8] == 'again'

local refusal = holder .. '!' -- tells a second arrival of this from acks of the same lease
local now = now_of_server()
local about = about_lease(lease)
if not is_held(about, holder, now) then
  return { about.by == refusal and 'ok' or 'lost' }
end
redis.call('ZCARD', due) -- these fail here, before the first write, if they are something else
redis.call('ZCARD', dead)

local at = tonumber(string.match(redis.call('GET', position) or '', '^%d+') or -1)
if at >= sequence and not is_again then
  -- An ack whose caller did not wait for the answer was carried out; what follows was not tried.
  redis.call('HSET', lease, 'holder', '', 'until', '0', 'by', refusal, 'tries', 0)
  redis.call('ZADD', due, 0, root)
  return { 'acked' }
end
-- Of an event that came by a ring, under a lease that was kept, it was the first time.
local tries = about.of == sequence and about.tries or 1
if is_again or tries >= most_tries then
  local left = is_again and string.gsub(about.again, '^%d+ ?', '') or about.again
  bury(dead, root, sequence, id, tries, now, reason)
  if not is_again then
    advance(position, lease, sequence, id)
  end
  redis.call('HSET', lease, 'holder', '', 'until', '0', 'by', refusal, 'again', left)
  redis.call('ZADD', due, 0, root)
  return { 'buried' }
end
local free = delay > 0 and now + delay or 0
redis.call('HSET', lease, 'holder', '-', 'until', string.format('%.0f', free), 'by', refusal,
  'of', string.format('%.0f', sequence), 'tries', tries)
redis.call('ZADD', due, free, root)
return { 'ok' }
