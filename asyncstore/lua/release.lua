#!lua
-- Gives leases back whose events were not tried, so that others get them at once.
-- KEYS: commits, due, then the lease of each aggregate (see keys.py)
-- ARGV: for each root and holder
-- Reply: {'ok' or 'lost', ...}, one for each
-- include: commit.lua
-- include: leases.lua
local commits, due = KEYS[1], KEYS[2]
local FIRST_KEY = 3

take_commits(commits, 1) -- tells those who sweep that there is something to do
local now = now_of_server()
local replies = {}
for place = FIRST_KEY, #KEYS do
  local argument = 2 * (place - FIRST_KEY) + 1
  local root, holder = ARGV[argument], ARGV[argument + 1]
  local about = about_lease(KEYS[place])
  if is_held(about, holder, now) then
    redis.call('HSET', KEYS[place], 'holder', '', 'until', '0', 'tries', math.max(about.tries - 1, 0),
      'waits', '')
    redis.call('ZADD', due, 0, root)
    replies[#replies + 1] = 'ok'
  else
    replies[#replies + 1] = 'lost'
  end
end
return replies
