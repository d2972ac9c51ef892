-- Numbers commits and tells their time.

-- Returns the first of `count` new numbers, and the time in microseconds, as text. The time of the
-- last commit is kept with its number: the store's own times never run backwards, even when the
-- server's clock does.
local function take_commits(commits, count)
  local clock = redis.call('TIME')
  local now = clock[1] .. string.format('%06d', clock[2])
  local number, last = string.match(redis.call('GET', commits) or '0', '^(%d+) ?(%d*)$')
  if last ~= '' and tonumber(last) > tonumber(now) then
    now = last
  end
  redis.call('SET', commits, string.format('%.0f %s', number + count, now))
  return number + 1, now
end
