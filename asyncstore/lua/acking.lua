-- How the ack of a lease is carried out, by way of at_once.lua or later.lua, and of settling.lua. It
-- goes by what the script before it has named: the keys `position`, `lease`, `events`, `divergence`
-- and `main`; `root`, `holder`, `through`, `id`, `following` and `is_again`, as ack.lua has them;
-- `moment`, the server's time.
local found = redis.call('HMGET', lease, 'holder', 'until', 'by', 'again')
local about = {
  holder = found[1] or '', ends = tonumber(found[2]) or 0, by = found[3], again = found[4] or '',
}
local next_sequence, diverged_at = end_of(events, divergence, main)
local at = tonumber(position_of(value_at(position), diverged_at) or -1)
local is_still_held = is_held(about, holder, moment)

-- Whether the lease was given back by this ack, or one of the same lease that went as far.
local function was_acked()
  return about.by == holder and (is_again or at >= through)
end

-- Moves the position, and gives the lease back or goes on with it. `stop` is the sequence after the
-- last event.
local function settle(stop)
  if is_again then
    local left = string.gsub(about.again, '^%d+ ?', '')
    redis.call('HSET', lease, 'holder', '', 'until', '0', 'by', holder, 'again', left)
    make_due(0, root)
    return 'more'
  end
  if goes_on then
    note(at, 'of', following, 'tries', 1)
    return 'ok'
  end
  local has_more = math.max(at, through) + 1 < stop or about.again ~= ''
  if following == 'keep' and not has_more then
    note(at)
    drop(root)
    return 'kept'
  end
  note(at, 'holder', '', 'until', '0')
  if has_more then
    make_due(0, root)
    return 'more'
  end
  drop(root)
  return 'idle'
end
