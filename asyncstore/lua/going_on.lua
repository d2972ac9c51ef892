-- The ack of a lease that goes on, as most acks are: it looks at no more than it needs. It goes by
-- the names that acking.lua goes by, and answers if it can; if not, acking.lua has to find out why.
if following ~= '' and following ~= 'keep' and not is_again then
  local found = redis.call('HMGET', lease, 'holder', 'until')
  local is_held_on = found[1] == holder and tonumber(found[2]) > moment
  local at = is_held_on and tonumber(value_at(position) or -1) -- nil where it has a mark
  if at then
    if at < through then
      move(position, through)
      redis.call('HSET', lease, 'at', string.format('%.0f', through), 'id', id, 'by', holder,
        'of', following, 'tries', 1)
    else
      redis.call('HSET', lease, 'by', holder, 'of', following, 'tries', 1)
    end
    return { 'ok' }
  end
end
