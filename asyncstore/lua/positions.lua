-- A position on another edition than main that was put before it diverged has a mark behind its
-- number: it may stand at events that are no part of the edition any more.
local UNDIVERGED = '*'

-- Returns the position as text by what is at its key, or false where there is none. One that was put
-- further than where the edition has diverged since then stands right before that.
local function position_of(value, diverged_at)
  local number = value and string.match(value, '^(%d+)%' .. UNDIVERGED .. '$')
  if not number then
    return value
  end
  if diverged_at and tonumber(number) >= diverged_at then
    return diverged_at > 0 and string.format('%.0f', diverged_at - 1)
  end
  return number
end
