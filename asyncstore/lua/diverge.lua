-- Puts the latest of the older snapshots in the place of the newest, which is gone.
local function promote_snapshot(branch)
  local from, found, found_at = nil, nil, -1
  for _, older in ipairs({ branch.kept, branch.recent }) do
    local last = redis.call('ZRANGE', older, -1, -1, 'WITHSCORES')
    if last[1] and tonumber(last[2]) > found_at then
      from, found, found_at = older, last[1], tonumber(last[2])
    end
  end
  local head = '^%[(%d+),(%d+),"(%l+)","(%l+)",?(%d*)%]\n'
  local sequence, time, retention, encoding, schema = string.match(found or '', head)
  if sequence then
    local state = string.sub(found, string.find(found, '\n', 1, true) + 1)
    redis.call('HSET', branch.newest, 'sequence', sequence, 'time', time, 'retention', retention,
      'encoding', encoding, 'schema', schema ~= '' and schema or '0', 'state', state)
    redis.call('ZREM', from, found)
  end
end

-- Lets an edition leave main. Snapshots that were put while it still read as main, of what will now
-- never be part of it, go.
local function diverge(branch, at)
  local newest = tonumber(redis.call('HGET', branch.newest, 'sequence'))
  redis.call('ZREMRANGEBYSCORE', branch.kept, at, '+inf')
  redis.call('ZREMRANGEBYSCORE', branch.recent, at, '+inf')
  if newest and newest >= at then
    redis.call('UNLINK', branch.newest)
    promote_snapshot(branch)
  end
  redis.call('SET', branch.divergence, string.format('%.0f', at))
end
