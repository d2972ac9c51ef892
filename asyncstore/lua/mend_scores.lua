#!lua
-- Sets the scores of an index to 0: only then can it be searched by its members.
-- KEYS: the index (claims, correlated, attached, editions or domains, see keys.py)
-- Reply: {'added'}, or {'right'} when it was as it should be
local index = KEYS[1]
local MEMBERS_A_CALL = 1000

local is_right = true
for _, range in ipairs({ { '-inf', '(0' }, { '(0', '+inf' } }) do
  repeat
    local members = redis.call('ZRANGE', index, range[1], range[2], 'BYSCORE', 'LIMIT', 0, MEMBERS_A_CALL)
    for _, member in ipairs(members) do
      redis.call('ZADD', index, 0, member)
      is_right = false
    end
  until #members == 0
end
return { is_right and 'right' or 'added' }
