-- Lists the correlation ids that have claims in a sorted set: looks at the first claim of each.
local CORRELATION = 'correlation:' -- see keys.py
local IDS_A_CALL = 200

-- Returns how often erased aggregates were taken out of indexes in other slots.
local function count_of(erasures)
  return tonumber(redis.call('GET', erasures) or '0')
end

local function correlation_ids(claims)
  local ids, from = {}, '[' .. CORRELATION
  while #ids < IDS_A_CALL do
    local claim = redis.call('ZRANGE', claims, from, '(correlation;', 'BYLEX', 'LIMIT', 0, 1)[1]
    if not claim then
      break
    end
    ids[#ids + 1] = string.match(claim, '^' .. CORRELATION .. '([^\n]*)\n')
    from = '(' .. CORRELATION .. ids[#ids] .. '\v'
  end
  return ids
end
