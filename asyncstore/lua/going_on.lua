-- The ack of a lease that goes on, as most acks are: it looks at no more than it needs. It goes by
-- the names that acking.lua goes by, and answers if it can; if not, acking.lua has to find out why.
if goes_on and not is_again then
  local found = redis.call('HMGET', lease, 'holder', 'until')
  local is_held_on = found[1] == holder and tonumber(found[2]) > moment
  local at = is_held_on and tonumber(value_at(position) or -1) -- nil where it has a mark
  if at then
    note(at, 'of', following, 'tries', 1)
    return { 'ok' }
  end
end
