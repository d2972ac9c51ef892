-- Shared by read.lua and load.lua, which the loader puts this into.
local BYTES_A_PAGE = 1048576 -- about a millisecond of the server's time
local FIRST_CHUNK, LARGEST_CHUNK = 16, 4096

local function happened_until(member, latest)
  local time = tonumber(string.match(member, '^%[%d+,(-?%d+),'))
  return not time or time <= latest -- what can't be read is for the client to complain about
end

-- Puts members of the range into `reply`, until `limit` of them are there, about BYTES_A_PAGE have
-- been looked at, or the range ends. reply[1] becomes the sequence to go on after, '' at the end.
local function page(reply, events, start, stop, limit, backwards, latest)
  local from, to, direction = start, stop, nil
  if backwards then
    from, to, direction = stop, start, 'REV'
  end
  local room, looked_at, bytes, chunk = limit, 0, 0, FIRST_CHUNK
  while room > 0 and bytes < BYTES_A_PAGE do
    chunk = latest and chunk or math.min(chunk, room)
    local command = { 'ZRANGE', events, from, to, 'BYSCORE', direction or 'LIMIT' }
    if direction then
      command[#command + 1] = 'LIMIT'
    end
    command[#command + 1] = looked_at
    command[#command + 1] = chunk
    local members = redis.call(unpack(command))
    for _, member in ipairs(members) do
      bytes = bytes + #member
      if room > 0 and (not latest or happened_until(member, latest)) then
        reply[#reply + 1] = member
        room = room - 1
      end
    end
    looked_at = looked_at + #members
    if room == 0 then
      reply[1] = redis.call('ZSCORE', events, reply[#reply])
      return
    end
    if #members < chunk then
      reply[1] = ''
      return
    end
    reply[1] = redis.call('ZSCORE', events, members[#members])
    local fits = math.floor((BYTES_A_PAGE - bytes) * looked_at / math.max(bytes, 1))
    chunk = math.max(FIRST_CHUNK, math.min(fits, LARGEST_CHUNK))
  end
end
