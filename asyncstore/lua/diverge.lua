-- Lets an edition leave main. Snapshots that were put while it still read as main, of what will now
-- never be part of it, go.
local function diverge(branch, at)
  local newest = tonumber(redis.call('HGET', branch.newest, 'sequence'))
  redis.call('ZREMRANGEBYSCORE', branch.kept, at, '+inf')
  redis.call('ZREMRANGEBYSCORE', branch.recent, at, '+inf')
  if newest and newest >= at then
    redis.call('UNLINK', branch.newest)
  end
  redis.call('SET', branch.divergence, string.format('%.0f', at))
end
