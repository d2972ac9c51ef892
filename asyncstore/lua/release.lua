#!lua
-- Gives leases back whose events were not tried, so that others get them at once.
-- KEYS: due, then the lease of each aggregate (see keys.py)
-- ARGV: for each root and holder
-- Reply: {'ok' or 'lost', ...}, one for each
-- include: leases.lua
local due = KEYS[1]

local now = now_of_server()
local replies = {}
for place = 2, #KEYS do
  local root, holder = ARGV[2 * place - 3], ARGV[2 * place - 2]
  local about = about_lease(KEYS[place])
  if is_held(about, holder, now) then
    redis.call('HSET', KEYS[place], 'holder', '', 'until', '0', 'tries', math.max(about.tries - 1, 0))
    redis.call('ZADD', due, 0, root)
    replies[#replies + 1] = 'ok'
  else
    replies[#replies + 1] = 'lost'
  end
end
return replies
