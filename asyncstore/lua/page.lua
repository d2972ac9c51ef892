-- Shared by read.lua and load.lua, which the loader puts this into.
local BYTES_A_PAGE = 1048576 -- about a millisecond of the server's time
local FIRST_CHUNK, LARGEST_CHUNK = 4, 32

local function happened_until(member, latest)
  local time = tonumber(string.match(member, '^%[%d+,(-?%d+),'))
  return not time or time <= latest -- what can't be read is for the client to complain about
end

local function chunk_of(events, start, stop, size, backwards)
  if backwards then
    return redis.call('ZRANGE', events, stop, start, 'BYSCORE', 'REV', 'LIMIT', 0, size)
  end
  return redis.call('ZRANGE', events, start, stop, 'BYSCORE', 'LIMIT', 0, size)
end

-- Puts members of the range into `reply`, until `limit` of them are there, BYTES_A_PAGE have been
-- looked at, or the range ends. reply[1] becomes the sequence to go on after, '' at the end.
-- How large events are is found out on the way, a few first and then more each time: large ones
-- overshoot a page by a few.
local function page(reply, events, start, stop, limit, backwards, latest)
  local room, bytes, size = limit, 0, FIRST_CHUNK
  while true do
    if not latest then
      size = math.min(size, room)
    end
    local members = chunk_of(events, start, stop, size, backwards)
    for _, member in ipairs(members) do
      bytes = bytes + #member
      if room > 0 and (not latest or happened_until(member, latest)) then
        reply[#reply + 1] = member
        room = room - 1
      end
    end
    if room == 0 then
      reply[1] = redis.call('ZSCORE', events, reply[#reply])
      return
    end
    if #members < size then
      reply[1] = ''
      return
    end
    reply[1] = redis.call('ZSCORE', events, members[#members])
    if bytes >= BYTES_A_PAGE then
      return
    end
    if backwards then
      stop = '(' .. reply[1]
    else
      start = '(' .. reply[1]
    end
    size = math.min(4 * size, LARGEST_CHUNK)
  end
end
